"""One client's working parts: intake, judge, runner, and one call's way through them."""

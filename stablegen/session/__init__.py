"""One client's working parts: intake, judge, runner, and the way of one call."""

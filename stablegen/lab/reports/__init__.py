"""What the experiments found: values alone, without torch, and the words in which tables and pages show them."""

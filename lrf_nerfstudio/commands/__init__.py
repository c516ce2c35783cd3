"""What a person runs: a module for each command, with a dataclass of its options and `main`, which takes them."""

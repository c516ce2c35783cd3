"""What the scripts run: one module for each, with its options and its `main`."""

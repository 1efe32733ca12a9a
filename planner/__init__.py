"""The planner: tensors, bytes, budgets and file layouts. It knows no model and no YAML, and reads no file."""

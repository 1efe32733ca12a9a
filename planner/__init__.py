"""The planner: tensors, bytes, budgets and file layouts. It knows no model, no YAML, no thread, and reads no file."""

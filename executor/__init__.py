"""The executor: reads, transforms and writes the bytes of a plan. It knows no expert and no gate."""

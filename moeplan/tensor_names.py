"""What dense models call their tensors; `{layer}` stands for each layer's number."""

EMBEDDING, NORM, OUTPUT_MATRIX = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."
MLP = LAYER + "mlp."


def is_mlp(name: str) -> bool:
    """Whether a tensor or a module is an MLP's, by its name in the model or in a layer."""
    return ".mlp." in f".{name}"

"""Records what SGLang's `load_weights` copies, and what else it does."""

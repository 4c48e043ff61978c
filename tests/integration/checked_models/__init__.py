"""Models for SGLANG_EXTERNAL_MODEL_PACKAGE: what a user's own model class may do in `load_weights`."""

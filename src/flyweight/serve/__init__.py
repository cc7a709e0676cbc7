"""The HTTP service. Nothing here, nor below it, imports torch or transformers."""

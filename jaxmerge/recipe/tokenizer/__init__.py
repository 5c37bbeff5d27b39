"""The tokenizer of a merged model, and the rows of its embeddings."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "approximation",
    "build",
    "chat_template",
    "embeddings",
    "token_keys",
    "transplant",
  ),
)

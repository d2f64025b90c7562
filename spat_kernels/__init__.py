from ._library import config

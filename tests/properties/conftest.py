"""One setting for all properties: an example takes as long as it takes, machines are slow and shared."""

from hypothesis import settings

settings.register_profile("fedge", deadline=None)
settings.load_profile("fedge")

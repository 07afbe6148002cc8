"""What all tests share: Hypothesis tries the same examples each time, and a loaded machine is no failure."""

from hypothesis import settings

settings.register_profile("weir", deadline=None, derandomize=True)
settings.load_profile("weir")

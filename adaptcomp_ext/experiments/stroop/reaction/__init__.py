"""Steps as reaction time: a recurrent network under ACT reads digits or names their ink."""

from .measure import Setting, measure_reaction, recipe_for, settings_of

__all__ = ["Setting", "measure_reaction", "recipe_for", "settings_of"]

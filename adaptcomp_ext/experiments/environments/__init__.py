"""What agents act in: vector environments in Gymnasium's interface. Need the extras ``maze`` or ``control``."""

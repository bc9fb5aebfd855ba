"""Vector environments with Gymnasium's interface. They need the extras ``maze`` or ``control``."""

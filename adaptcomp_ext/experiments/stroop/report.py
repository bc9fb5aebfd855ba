"""From a plan to JSON, Markdown and figures."""

"""Programs compiled ahead of time for chips that are not attached, and what they need there."""

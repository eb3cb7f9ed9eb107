"""A recipe that is found: how much each unit's bits matter, and which bits fit a size or a loss best."""

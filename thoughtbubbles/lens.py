"""Reading streams: what a model would predict if it ended at a site."""

from thoughtbubbles.sites import Activation, Edit, SitedModel, Visit, capture

__all__ = ["Activation", "Edit", "SitedModel", "Visit", "capture"]

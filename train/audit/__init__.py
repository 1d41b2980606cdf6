"""Auditing: what a model holds that it does not say, read from inside and elicited from outside."""

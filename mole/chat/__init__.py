"""Replies with their routing, and the models kept in memory for them."""

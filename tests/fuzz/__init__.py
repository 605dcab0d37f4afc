"""Hostile input: messages that almost fit, thrown at live processes and at the codec."""

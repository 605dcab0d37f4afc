"""The weight channel: its two ends (publisher, subscriber), what serves versions, and the relay between."""

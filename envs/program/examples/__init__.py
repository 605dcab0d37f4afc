"""Examples of agent programs that train."""

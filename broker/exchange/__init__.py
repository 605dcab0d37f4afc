"""The experience channel: the server's loop, its peers, and what is checked on the way in."""

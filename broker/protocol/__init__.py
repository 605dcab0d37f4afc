"""What processes must agree on: the wire format of both channels. No sockets, no clocks, no files."""

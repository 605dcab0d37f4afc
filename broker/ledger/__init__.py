"""What becomes of tickets, as a pure state machine: no I/O, no clock."""

"""FuXi-β beside other people's libraries on the same events: seconds of an epoch, and quality after equal time."""

"""The server's side of releases: make them, sign what a channel says, roll them out, hear what devices tell."""

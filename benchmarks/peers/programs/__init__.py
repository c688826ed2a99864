"""What runs in a candidate's own process and environment. In a peer's there is this checkout on the
path, numpy and the peer: nothing else of the project is imported there."""

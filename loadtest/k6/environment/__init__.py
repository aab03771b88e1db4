"""The environment of the k6 scripts: processes on loopback, and what is read from them."""

"""Many runs: which, where, and what is kept of them."""

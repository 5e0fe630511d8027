"""From kernels to tokens and money: what a step, a token, a request and a fleet take in time, joules and dollars."""

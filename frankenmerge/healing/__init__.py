"""Short training of what a splice broke: scopes, memory, tokens, objective, state, descent."""

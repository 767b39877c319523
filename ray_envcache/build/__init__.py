"""How an environment is made."""

"""What is in a store: state, users and bytes of each entry, what entries share, and whether they are intact."""

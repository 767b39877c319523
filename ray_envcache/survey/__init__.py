"""What is in a store: state, users and bytes of each entry, and what entries share."""

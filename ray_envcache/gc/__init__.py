"""What goes, and when."""

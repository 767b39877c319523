"""What people write in a runtime_env, and how Ray learns of it. Pure."""

"""Evidence: is the served model the trained one?"""

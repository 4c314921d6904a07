"""What a finished or running study says about its use of resources."""

"""Values that must never change, and the script that wrote them."""

"""What the method is made of, one noun a file; README, "Where the code lives", has the layers."""

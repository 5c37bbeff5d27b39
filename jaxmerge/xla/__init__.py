"""What a compiled program does, read from its text: who talks to whom, products, bytes."""

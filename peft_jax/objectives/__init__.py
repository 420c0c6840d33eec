"""What is minimised: objectives, and how a batch is read for them."""

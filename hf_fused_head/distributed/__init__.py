"""What ranks say to each other; lies below the engines and knows none of them."""

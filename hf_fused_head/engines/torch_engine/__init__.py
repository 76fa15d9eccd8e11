"""impl="torch": bounded memory on any device, by plain torch operations."""

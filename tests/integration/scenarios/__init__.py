"""What the ranks of the test jobs do. Assertions here fail the rank, and with it the job."""

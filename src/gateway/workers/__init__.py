"""Workers: what the processes of one `gateway serve` say to each other, through their supervisor."""

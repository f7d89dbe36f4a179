"""What the tests share: ranks, fake groups, oracles, mutations."""

package main

// The page checker: it reads the pages of a database file without bbolt and verifies that
// each page is used exactly once, that the elements of a page lie inside it, that keys are in
// order, and whatever else bbolt assumes of pages, even in its own check, and crashes, loops
// forever or overwrites data where it does not hold. So a file is checked before bbolt maps it,
// except for a large one that is served: of that, the list of free pages and the root bucket are
// checked before, and the branch pages right after.
//
// A file may have been made to harm the checker. So no recursion is deeper than maxTreeDepth,
// no page is followed twice, and memory does not depend on numbers in the file: there is a bit
// for each page, and of a large page only the parts that are needed are read.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
)

const (
	// maxTreeDepth is the most levels of pages that are followed, from the root of the file. No
	// tree is as deep, since a branch page has at least two pages below it.
	maxTreeDepth = 64
	// maxKey is the size in bytes of the longest key that bbolt stores.
	maxKey = 1 << 15
	// maxLeaf is the size in bytes of the largest leaf page. bbolt cannot address more.
	maxLeaf = math.MaxInt32
)

// pageChecker checks the pages that a meta page leads to.
type pageChecker struct {
	pageAccount
	// branchesOnly is true if leaf pages of the buckets are only marked as used and not read, and
	// rootOnly if the pages of the buckets are not looked at.
	branchesOnly, rootOnly bool
	previous               []byte                   // the previous key of a large page
	branches               [maxTreeDepth + 1][]byte // the branch pages above the current page, by level
}

// pageTree is the tree of pages of one bucket.
type pageTree struct {
	// isRoot is true for the root bucket, whose elements are the other buckets. They contain no
	// buckets.
	isRoot bool
	// height is the level of all leaf pages, or 0 as long as no leaf page has been read. The
	// root page of the file is on level 1, and that of a bucket below the page that refers to it.
	height int
}

// bounds are the limits that the branch page above sets for the keys of a page: the first
// key is first, and all keys are less than end. A limit that is nil is not known.
type bounds struct{ first, end []byte }

// pageElement names the place of a fault: a page, or an element of a page that is an inline
// bucket.
type pageElement struct {
	page    uint64
	element int // -1 for the page
}

func (p pageElement) String() string {
	if p.element < 0 {
		return fmt.Sprintf("page %d", p.page)
	}
	return fmt.Sprintf("page %d, element %d", p.page, p.element)
}

// checkPages checks all pages of the transaction of a meta page that meta.check has accepted.
// It calls report with each fault and progress with the number of bytes checked since the last
// call. It returns an error if the file cannot be read, or if progress returns one.
func checkPages(f *os.File, m meta, report func(string), progress func(bytes int64) error) error {
	broken := false
	c := pageChecker{pageAccount: newPageAccount(f, m.pageSize, m.pages, func(fault string) { broken = true; report(fault) }, progress)}
	if err := c.checkFromMeta(m); err != nil {
		return err
	}
	// The checker does not read the pages below a broken page, so they look lost.
	for id := c.next(0, false); id < m.pages && !broken; id = c.next(id, false) {
		last := c.next(id, true) - 1
		if id == last {
			report(fmt.Sprintf("page %d is neither in use nor free", id))
		} else {
			report(fmt.Sprintf("pages %d to %d are neither in use nor free", id, last))
		}
		id = last + 1
	}
	return nil
}

// checkFromMeta checks the list of free pages and the tree of the root bucket.
func (c *pageChecker) checkFromMeta(m meta) error {
	if err := c.checkFreelist(m.freelist); err != nil {
		return err
	}
	return c.checkTree(&pageTree{isRoot: true}, m.root, 1, bounds{})
}

// maxSmallFile is the size, in bytes, of the largest file of which all pages are checked
// before it is served, which takes some 20 ms. Of a larger file the branch pages are checked in
// the background while it is served; the check command checks all of it.
const maxSmallFile = 32 << 20

// checkBeforeUse checks the pages of a file before bbolt maps it: all of a file of at most
// maxSmallFile, and else the list of free pages, which bbolt loads at once, and the root bucket. It
// returns an error that wraps ErrDamaged if a page is broken, and whether all pages were checked.
// meta.check has accepted m.
func checkBeforeUse(f *os.File, m meta) (all bool, err error) {
	var first firstFault
	progress := func(int64) error { return nil }
	if all = m.bytes() <= maxSmallFile; all {
		err = checkPages(f, m, first.found, progress)
	} else {
		c := pageChecker{pageAccount: newPageAccount(f, m.pageSize, m.pages, first.found, progress), rootOnly: true}
		err = c.checkFromMeta(m)
	}
	if err != nil {
		return false, err
	}
	return all, first.err()
}

// firstFault keeps the first fault of a check, for callers that need only one.
type firstFault struct{ fault string }

// found records a fault.
func (f *firstFault) found(fault string) {
	if f.fault == "" {
		f.fault = fault
	}
}

// err returns an error that wraps ErrDamaged, or nil if no fault was reported.
func (f *firstFault) err() error {
	if f.fault == "" {
		return nil
	}
	return fmt.Errorf("%w: %s; restore a backup", ErrDamaged, f.fault)
}

// checkBranches is checkPages without the leaf pages, which it only marks as used. Branch pages are
// about a hundredth of the file. If none is broken, no search in the trees can run in a cycle of
// branch pages forever.
func checkBranches(f *os.File, m meta, report func(string), progress func(bytes int64) error) error {
	c := pageChecker{pageAccount: newPageAccount(f, m.pageSize, m.pages, report, progress), branchesOnly: true}
	return c.checkFromMeta(m)
}

// heightOf returns the level of the leftmost leaf page of a tree, with the root page on
// level 1. All leaf pages of a tree are on the same level.
func (c *pageChecker) heightOf(root uint64) (height int, err error) {
	page := make([]byte, c.pageSize)
	for id := root; id < c.pages && height < maxTreeDepth; height++ {
		if _, err := c.f.ReadAt(page, int64(id)*c.pageSize); err != nil {
			return 0, fmt.Errorf("read page %d: %w", id, err)
		}
		child, ok := branchChild(page, nil)
		if !ok {
			return height + 1, nil
		}
		id = child
	}
	return height, nil
}

// checkTree checks a page on the level depth, and all pages below it. It does not check
// the pages below a broken page.
func (c *pageChecker) checkTree(t *pageTree, id uint64, depth int, b bounds) error {
	if c.branchesOnly && !t.isRoot && depth == t.height {
		c.markUse(id, usedTwice)
		return nil
	}
	if depth > maxTreeDepth {
		c.report(fmt.Sprintf("page %d is more than %d levels deep, which no database is", id, maxTreeDepth))
		return nil
	}
	size, ok, err := c.readPage(id)
	if !ok || err != nil {
		return err
	}
	where := pageElement{id, -1}
	kind := binary.NativeEndian.Uint16(c.page[8:])
	switch {
	case kind != branchPageFlag && kind != leafPageFlag:
		c.report(where.String() + " is neither a branch page nor a leaf page")
		return nil
	// bbolt merges pages that are beside each other, whatever they are.
	case kind == branchPageFlag && t.height > 0 && depth >= t.height:
		c.report(fmt.Sprintf("%s is a branch page on level %d, and the leaf pages of its tree are on level %d", where, depth, t.height))
		return nil
	case kind == leafPageFlag && t.height > 0 && depth != t.height:
		c.report(fmt.Sprintf("%s is a leaf page on level %d, and other leaf pages of its tree are on level %d", where, depth, t.height))
		return nil
	case kind == branchPageFlag:
		return c.checkBranch(t, where, size, depth, b)
	}
	t.height = depth
	// An empty bucket is inline in its parent, so that no leaf page is empty.
	if binary.NativeEndian.Uint16(c.page[10:]) == 0 {
		c.report(where.String() + " is a leaf page without elements")
		return nil
	}
	roots, err := c.checkLeaf(where, c.page, size, b, t.isRoot)
	if err != nil || c.rootOnly {
		return err
	}
	for _, root := range roots {
		var bucket pageTree
		if c.branchesOnly {
			if bucket.height, err = c.heightOf(root); err != nil {
				return err
			}
			bucket.height += depth
		}
		if err := c.checkTree(&bucket, root, depth+1, bounds{}); err != nil {
			return err
		}
	}
	return nil
}

// checkBranch checks the branch page that readPage has read, and all pages below it.
func (c *pageChecker) checkBranch(t *pageTree, where pageElement, size int64, depth int, b bounds) error {
	count := int(binary.NativeEndian.Uint16(c.page[10:]))
	switch {
	case size > int64(len(c.page)):
		c.report(fmt.Sprintf("%s is a branch page of %d bytes, larger than any", where, size))
		return nil
	case count == 0:
		c.report(where.String() + " is a branch page without elements")
		return nil
	case count == 1: // bbolt merges and cannot find what with
		c.report(where.String() + " is a branch page with one element only")
		return nil
	}
	page := append(c.branches[depth][:0], c.page...)
	c.branches[depth] = page
	key := func(i int) []byte {
		at := pageHeaderSize + i*elementSize
		pos := at + int(binary.NativeEndian.Uint32(page[at:]))
		return page[pos : pos+int(binary.NativeEndian.Uint32(page[at+4:]))]
	}
	ok, err := c.checkElements(where, page, size, b, branchLayout, nil)
	if !ok || err != nil {
		return err
	}
	for i := range count {
		below := bounds{key(i), b.end}
		if i+1 < count {
			below.end = key(i + 1)
		}
		child := binary.NativeEndian.Uint64(page[pageHeaderSize+i*elementSize+8:])
		if err := c.checkTree(t, child, depth+1, below); err != nil {
			return err
		}
	}
	return nil
}

// checkLeaf checks the elements of a leaf page of size bytes, of which page is the beginning. In
// the root bucket they are buckets, else values. It returns the ids of the root pages of the
// buckets. An inline bucket has no page of its own and is checked at once.
func (c *pageChecker) checkLeaf(where pageElement, page []byte, size int64, b bounds, isRoot bool) (roots []uint64, err error) {
	if size > maxLeaf {
		c.report(fmt.Sprintf("%s is a leaf page of %d bytes, larger than any", where, size))
		return nil, nil
	}
	_, err = c.checkElements(where, page, size, b, leafLayout, func(i int, flags uint32, at, size int64) error {
		switch {
		case flags != 0 && flags != bucketLeafFlag:
			c.report(fmt.Sprintf("%s has an element %d of an unknown kind", where, i))
		case isRoot && flags == 0:
			c.report(fmt.Sprintf("%s has an element %d that is a value outside of a bucket", where, i))
		case !isRoot && flags == bucketLeafFlag:
			c.report(fmt.Sprintf("%s has an element %d that is a bucket inside a bucket", where, i))
		case !isRoot:
		case size < bucketHeaderSize:
			c.report(fmt.Sprintf("%s has an element %d that is a bucket of %d bytes, fewer than its header has", where, i, size))
		case size > c.pageSize: // an inline bucket takes a quarter of a page
			c.report(fmt.Sprintf("%s has an element %d that is a bucket of %d bytes, more than an inline one has", where, i, size))
		default:
			bucket, err := c.read(where.page, at, size)
			if err != nil {
				return err
			}
			if root := binary.NativeEndian.Uint64(bucket); root != 0 {
				roots = append(roots, root)
				return nil
			}
			return c.checkInline(pageElement{where.page, i}, bucket[bucketHeaderSize:])
		}
		return nil
	})
	return roots, err
}

// checkInline checks the page of an inline bucket.
func (c *pageChecker) checkInline(where pageElement, page []byte) error {
	switch {
	case len(page) < pageHeaderSize || binary.NativeEndian.Uint16(page[8:]) != leafPageFlag:
		c.report(where.String() + " is an inline bucket without a leaf page")
	// bbolt frees the pages that the header names when the bucket gets pages of its own.
	case binary.NativeEndian.Uint64(page) != 0 || binary.NativeEndian.Uint32(page[12:]) != 0:
		c.report(where.String() + " is an inline bucket whose header names pages")
	case binary.NativeEndian.Uint16(page[10:]) == 0 && len(page) > pageHeaderSize:
		c.report(where.String() + " is an empty inline bucket, but has bytes after its header")
	default:
		_, err := c.checkLeaf(where, page, int64(len(page)), bounds{}, false)
		return err
	}
	return nil
}

// elementLayout has the offsets in an element at which it has the position of its key and the
// sizes of key and value, in bytes. A valueSize of 0 means that the elements have no value.
type elementLayout struct{ pos, keySize, valueSize int }

var (
	branchLayout = elementLayout{0, 4, 0}
	leafLayout   = elementLayout{4, 8, 12}
)

// checkElements checks that each element of a page of size bytes, of which page is the beginning,
// is where bbolt puts it: the keys and values follow one another without gaps, in the order of
// the elements, after the last element. It also checks that the keys are in order and within b.
// It calls value, unless that is nil, with the flags of each element and with the offset in the
// page and the size of its value, in bytes. It returns false if an element is not in its place,
// or if the keys are not in order.
func (c *pageChecker) checkElements(where pageElement, page []byte, size int64, b bounds, layout elementLayout, value func(i int, flags uint32, at, size int64) error) (ok bool, err error) {
	count := int(binary.NativeEndian.Uint16(page[10:]))
	next := int64(pageHeaderSize + count*elementSize)
	if next > size {
		c.report(fmt.Sprintf("%s has %d elements, more than fit", where, count))
		return false, nil
	}
	if next > int64(len(page)) {
		if page, err = c.readInto(page, where.page, 0, next); err != nil {
			return false, err
		}
		c.page = page
	}
	whole := int64(len(page)) == size
	ok = true
	var previous []byte
	for i := range count {
		at := pageHeaderSize + i*elementSize
		u32 := func(field int) int64 { return int64(binary.NativeEndian.Uint32(page[at+field:])) }
		keySize, valueAt := u32(layout.keySize), next+u32(layout.keySize)
		end := valueAt
		if layout.valueSize > 0 {
			end += u32(layout.valueSize)
		}
		switch {
		case int64(at)+u32(layout.pos) != next:
			c.report(fmt.Sprintf("%s has its element %d at a wrong position", where, i))
			return false, nil
		case end > size:
			c.report(fmt.Sprintf("%s has an element %d that ends outside the page", where, i))
			return false, nil
		case keySize == 0 || keySize > maxKey:
			c.report(fmt.Sprintf("%s has an element %d with a key of %d bytes", where, i, keySize))
			return false, nil
		}
		var key []byte
		if whole {
			key = page[next:valueAt]
		} else if key, err = c.read(where.page, next, keySize); err != nil {
			return false, err
		}
		switch {
		case i == 0 && b.first != nil && !bytes.Equal(key, b.first):
			c.report(fmt.Sprintf("%s does not begin with the key that its branch page has for it", where))
			ok = false
		case i > 0 && bytes.Compare(previous, key) >= 0:
			c.report(fmt.Sprintf("%s has the key of its element %d out of order", where, i))
			ok = false
		}
		if i == count-1 && b.end != nil && bytes.Compare(key, b.end) >= 0 {
			c.report(fmt.Sprintf("%s ends with a key that belongs to the next page", where))
			ok = false
		}
		if previous = key; !whole {
			c.previous = append(c.previous[:0], key...)
			previous = c.previous
		}
		if value != nil {
			if err := value(i, uint32(u32(0)), valueAt, end-valueAt); err != nil {
				return false, err
			}
		}
		next = end
	}
	return ok, nil
}

package main

// The page checker: reads every page of a database file without bbolt and verifies that
// each page is used exactly once, that elements lie inside their page and that keys are
// in order. bbolt assumes all of this, even in its own check, and crashes or loops
// where it does not hold.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
)

// maxTreeDepth is more than any tree has: a branch has at least two pages below.
const maxTreeDepth = 64

// survey is one look at the pages that a meta page leads to.
type pageChecker struct {
	f        *os.File
	pageSize int64
	uses     []pageUse // by page id
	// height is where the leaves are that are not looked at, or 0: all are.
	height   int
	levels   [maxTreeDepth + 1]level
	report   func(string)
	progress func(bytes int64) error
}

// pageUse is what a page is for, as far as is known.
type pageUse byte

const (
	pageLost pageUse = iota // by nothing that was looked at
	pageFree
	pageUsed
)

// level is the page that is looked at on one level of a tree.
type level struct {
	page     []byte
	elements []element
}

// element is where an element of a page is, its key, its value, and the end of that.
type element struct{ at, key, value, end int }

func (l *level) key(i int) []byte { return l.page[l.elements[i].key:l.elements[i].value] }

// bounds is what the branch above says of the keys of a page: which is the first, and
// before which all are. nil is not known.
type bounds struct{ first, end []byte }

// pagePlace is a page, or an element of one: a bucket that is inside.
type pageElement struct {
	page    uint64
	element int // -1 is the page
}

func (p pageElement) String() string {
	if p.element < 0 {
		return fmt.Sprintf("page %d", p.page)
	}
	return fmt.Sprintf("page %d, element %d", p.page, p.element)
}

func newPageChecker(f *os.File, pageSize int64, pages uint64, found func(string), seen func(bytes int64) error) *pageChecker {
	s := &pageChecker{f: f, pageSize: pageSize, uses: make([]pageUse, pages), report: found, progress: seen}
	s.uses[0], s.uses[1] = pageUsed, pageUsed // the meta pages
	return s
}

// surveyPages tells found what is wrong, and seen how much more was looked at. It
// returns an error when the file cannot be read, and seen's.
func checkPages(f *os.File, m meta, found func(string), seen func(bytes int64) error) error {
	broken := false
	s := newPageChecker(f, m.pageSize, m.pages, func(fault string) { broken = true; found(fault) }, seen)
	if err := s.checkFreelist(m.freelist); err != nil {
		return err
	}
	if err := s.checkTree(m.root, 1, bounds{}); err != nil {
		return err
	}
	for id, use := range s.uses {
		if use == pageLost && !broken { // which would be why
			found(fmt.Sprintf("page %d is neither in use nor free", id))
		}
	}
	return nil
}

// surveyedAtStart is the size, in bytes, of the largest file that is looked at as a whole
// before it is served: in some 20 ms. Of a larger one only the branches are, behind the
// back of those who ask already; check looks at all of it.
const maxSmallFile = 32 << 20

// surveyAtStart refuses a file with a broken page, before bbolt may see it. It returns
// false for one that is too large.
func checkSmallFile(f *os.File, m meta) (surveyed bool, err error) {
	if int64(m.pages)*m.pageSize > maxSmallFile {
		return false, nil
	}
	var first firstFault
	if err := checkPages(f, m, first.found, func(int64) error { return nil }); err != nil {
		return false, err
	}
	return true, first.err()
}

// firstFault is what matters of a survey to those who do not want to know them all.
type firstFault struct{ fault string }

func (f *firstFault) found(fault string) {
	if f.fault == "" {
		f.fault = fault
	}
}

func (f *firstFault) err() error {
	if f.fault == "" {
		return nil
	}
	return fmt.Errorf("%w: %s; restore a backup", ErrDamaged, f.fault)
}

// surveyBranches is surveyPages of the trees below some roots, without their leaves:
// a hundredth of the file, and enough for no search in them to be without an end.
func checkBranches(f *os.File, pageSize int64, pages uint64, roots []uint64, found func(string), seen func(bytes int64) error) error {
	s := newPageChecker(f, pageSize, pages, found, seen)
	for _, root := range roots {
		var err error
		if s.height, err = s.heightOf(root); err != nil {
			return err
		}
		if err := s.checkTree(root, 1, bounds{}); err != nil {
			return err
		}
	}
	return nil
}

// heightOf returns on which level the leftmost leaf of a tree is. All leaves are.
func (s *pageChecker) heightOf(root uint64) (height int, err error) {
	page := make([]byte, s.pageSize)
	for id := root; id < uint64(len(s.uses)) && height < maxTreeDepth; height++ {
		if _, err := s.f.ReadAt(page, int64(id)*s.pageSize); err != nil {
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

// use notes what a page is for, or tells that it cannot be.
func (s *pageChecker) markUse(id uint64, as pageUse) bool {
	switch {
	case id < 2 || id >= uint64(len(s.uses)):
		s.report(fmt.Sprintf("page %d is outside of the file, which has %d", id, len(s.uses)))
		return false
	case s.uses[id] == pageUsed:
		s.report(fmt.Sprintf("page %d is used twice", id))
		return false
	case s.uses[id] == pageFree:
		s.report(fmt.Sprintf("page %d is free, and is used or free once more", id))
		return false
	}
	s.uses[id] = as
	return true
}

// read reads a page and those that it overflows to, or returns false where something is
// wrong with it.
func (s *pageChecker) readPage(id uint64, l *level) (ok bool, err error) {
	if !s.markUse(id, pageUsed) {
		return false, nil
	}
	if int64(len(l.page)) < s.pageSize {
		l.page = make([]byte, s.pageSize)
	}
	l.page = l.page[:s.pageSize]
	if _, err := s.f.ReadAt(l.page, int64(id)*s.pageSize); err != nil {
		return false, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.NativeEndian.Uint32(l.page[12:]))
	switch is := binary.NativeEndian.Uint64(l.page); {
	case is != id:
		s.report(fmt.Sprintf("page %d says that it is page %d", id, is))
		return false, nil
	case id+overflow >= uint64(len(s.uses)):
		s.report(fmt.Sprintf("page %d goes on for %d pages, out of the file", id, overflow))
		return false, nil
	}
	for i := range overflow {
		if !s.markUse(id+1+i, pageUsed) {
			return false, nil
		}
	}
	if overflow > 0 {
		l.page = make([]byte, int64(overflow+1)*s.pageSize)
		if _, err := s.f.ReadAt(l.page, int64(id)*s.pageSize); err != nil {
			return false, fmt.Errorf("read page %d: %w", id, err)
		}
	}
	return true, s.progress(int64(len(l.page)))
}

// freelist looks at the page with the ids of the free ones.
func (s *pageChecker) checkFreelist(id uint64) error {
	var l level
	if ok, err := s.readPage(id, &l); !ok || err != nil {
		return err
	}
	count, at, ok := freeCount(l.page)
	if !ok {
		s.report(fmt.Sprintf("page %d is not the list of free pages", id))
		return nil
	}
	if count > (uint64(len(l.page))-at)/8 {
		s.report(fmt.Sprintf("the list of free pages has %d entries, more than fit", count))
		return nil
	}
	for i := range count {
		s.markUse(binary.NativeEndian.Uint64(l.page[at+8*i:]), pageFree)
	}
	return s.progress(int64(count) * s.pageSize)
}

// tree looks at a page on a level and all below it.
func (s *pageChecker) checkTree(id uint64, depth int, b bounds) error {
	if depth == s.height {
		s.markUse(id, pageUsed)
		return nil
	}
	if depth > maxTreeDepth {
		s.report(fmt.Sprintf("page %d is deeper than a database can be", id))
		return nil
	}
	l := &s.levels[depth]
	if ok, err := s.readPage(id, l); !ok || err != nil {
		return err
	}
	where := pageElement{id, -1}
	switch binary.NativeEndian.Uint16(l.page[8:]) {
	case branchPageFlag:
		if !s.parseElements(where, l, 0, 4, 0) {
			return nil
		}
		if len(l.elements) == 0 {
			s.report(where.String() + " is a branch with nothing below")
		}
		s.checkOrder(where, l, b)
		for i, e := range l.elements {
			below := bounds{l.key(i), b.end}
			if i+1 < len(l.elements) {
				below.end = l.key(i + 1)
			}
			if err := s.checkTree(binary.NativeEndian.Uint64(l.page[e.at+8:]), depth+1, below); err != nil {
				return err
			}
		}
	case leafPageFlag:
		if binary.NativeEndian.Uint16(l.page[10:]) == 0 { // an empty bucket is inside of its parent
			s.report(where.String() + " is a leaf with nothing in it")
		}
		for _, root := range s.checkLeaf(where, l, b) {
			if err := s.checkTree(root, depth+1, bounds{}); err != nil {
				return err
			}
		}
	default:
		s.report(where.String() + " is neither a branch nor a leaf")
	}
	return nil
}

// leaf returns the ids of the root pages of the buckets in it.
func (s *pageChecker) checkLeaf(where pageElement, l *level, b bounds) (roots []uint64) {
	if !s.parseElements(where, l, 4, 8, 12) {
		return nil
	}
	s.checkOrder(where, l, b)
	for i, e := range l.elements {
		switch binary.NativeEndian.Uint32(l.page[e.at:]) {
		case 0:
			continue
		case bucketLeafFlag:
		default:
			s.report(fmt.Sprintf("%s has an element %d of no kind", where, i))
			continue
		}
		bucket := l.page[e.value:e.end]
		switch {
		case len(bucket) < bucketHeaderSize:
			s.report(fmt.Sprintf("%s has a bucket of %d bytes as its element %d", where, len(bucket), i))
		case binary.NativeEndian.Uint64(bucket) != 0:
			roots = append(roots, binary.NativeEndian.Uint64(bucket))
		default:
			inline := &level{page: bucket[bucketHeaderSize:]}
			inside := pageElement{where.page, i}
			switch {
			case len(inline.page) < pageHeaderSize || binary.NativeEndian.Uint16(inline.page[8:]) != leafPageFlag:
				s.report(inside.String() + " is a bucket without a leaf")
			case binary.NativeEndian.Uint16(inline.page[10:]) == 0 && len(inline.page) > pageHeaderSize:
				s.report(inside.String() + " is an empty bucket with something in it")
			case len(s.checkLeaf(inside, inline, bounds{})) > 0:
				s.report(inside.String() + " is a bucket inside of its page, with a bucket in it")
			}
		}
	}
	return roots
}

// split finds the elements of a page, or returns false where one is not where bbolt puts
// it: their keys and values follow one another behind all of them. The position of a
// key, its size and the size of the value are at these offsets of an element; 0 is no
// value.
func (s *pageChecker) parseElements(where pageElement, l *level, pos, keySize, valueSize int) bool {
	l.elements = l.elements[:0]
	count := int(binary.NativeEndian.Uint16(l.page[10:]))
	next := pageHeaderSize + count*elementSize
	u32 := func(at int) int64 { return int64(binary.NativeEndian.Uint32(l.page[at:])) }
	for i := range count {
		at := pageHeaderSize + i*elementSize
		if next > len(l.page) || int64(at)+u32(at+pos) != int64(next) {
			s.report(fmt.Sprintf("%s has its element %d not where it belongs", where, i))
			return false
		}
		value := int64(next) + u32(at+keySize)
		end := value
		if valueSize > 0 {
			end += u32(at + valueSize)
		}
		if end > int64(len(l.page)) {
			s.report(fmt.Sprintf("%s has its element %d end outside of itself", where, i))
			return false
		}
		l.elements = append(l.elements, element{at, next, int(value), int(end)})
		next = int(end)
	}
	return true
}

// order looks at the keys of a page that has been split.
func (s *pageChecker) checkOrder(where pageElement, l *level, b bounds) {
	n := len(l.elements)
	if n == 0 {
		return
	}
	if b.first != nil && !bytes.Equal(l.key(0), b.first) {
		s.report(fmt.Sprintf("%s does not begin with the key that leads to it", where))
	}
	for i := 1; i < n; i++ {
		if bytes.Compare(l.key(i-1), l.key(i)) >= 0 {
			s.report(fmt.Sprintf("%s has the key of its element %d out of order", where, i))
		}
	}
	if b.end != nil && bytes.Compare(l.key(n-1), b.end) >= 0 {
		s.report(fmt.Sprintf("%s ends with a key that belongs to the next page", where))
	}
}
